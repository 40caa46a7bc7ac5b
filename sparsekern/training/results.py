"""The result file of `sparsekern train`: one JSON object, written anew after every run.

    {"format": 2,
     "flops": FLOP_CONVENTION,
     "environment": {...},              sparsekern.show.environment
     "data": {"name": "fashion-mnist", "sample": "image", "classes": 10,
              "train": 54000, "validation": 6000, "test": 10000,
              "image_shape": [28, 28] or null, "unigram_entropy": null or bits per character,
              "most_common": 0.1,       share of the test set's most common class: chance
              "test_digest": "9f86d081"},
     "task": {...},                     what all runs share: the fields of `TrainConfig` but those
                                        that a run has of its own; "model", "epochs", "batch_size"...
     "dense": {"inference": f_D, "training": 3 f_D samples x steps},   FLOPs of dense training, 1x
     "runs": [RUN, ...]}                in the order they were asked for

A RUN that is done:

    {"method": "rigl",                  as asked for: a recipe's name, or MODULE:CLASS
     "sparsity": 0.98,                  0.0 for dense
     "block": [1, 1],                   (outputs, inputs)
     "multiplier": 1.0,                 of the training's length
     "lr": 0.1,
     "seed": 0,
     "state": "done", "error": null,
     "learned": true,                   false: accuracy near chance, or the loss did not fall
     "validation": {"accuracy": 0.88, "bits": null} or null without a validation split,
     "test": {"accuracy": 0.87, "bits": null},      after the last step; bits per character of text
     "start_loss": 2.31,                nats, of the first batch before any step
     "curve": [{"step": 540,            weight steps so far; one entry for each epoch of the task
                "seconds": 1.9,         of training so far
                "training_flops": 1.2e12,           so far
                "loss": 0.61,           mean training loss since the entry before, nats
                "validation": {"accuracy": 0.84, "bits": null} or null,
                "nnz": 6304},           active weights of all the layers in "layers"
               ...],
     "flops": {"inference": 13000,      per sample, executed
               "dense_equivalent": 532400,          the same net if every layer were dense
               "training": 2.4e12,      of the run, by the active weights of each step
               "inference_ratio": 0.0244, "training_ratio": 0.031},   to "dense" above
     "held": {"weights": B, "gradients": B, "optimizer": B, "index": B},     bytes after the run
     "weight_steps": 5400, "update_batches": 41,
     "seconds": 21.0,                   of training: no evaluation, no counting
     "step_seconds": 0.0039,            the same for each batch, updates included
     "update_seconds": 0.006 or null,   median of a batch with a topology update
     "updates": [{"step": 0, "fraction": 0.5,       the method's history, `UpdateRecord`
                  "layers": {"hidden1": {"dropped": 2352, "grown": 2352, ...}}}, ...],
     "layers": [{"name": "hidden1", "shape": [300, 784], "nnz": 4700, "impl": "cpu"}, ...],
     "connections": {"start": [...], "end": [...]} or null,   leaving each input pixel of a fully
                                        connected first layer, row by row
     "frames": null or {...}}           for the movie: what topology_frames gives as plain data

A RUN that failed has the first six fields, "state": "failed" and "error": what was raised, in one
line. A run that was interrupted is not there.
"""
