"""Mutants that compute the same as the kernel, each with the reason why no test can tell."""

from typing import NamedTuple


class Equivalent(NamedTuple):
    """Mutants of one function by one operator, wherever the expression stands; no line numbers."""

    function: str
    operator: str
    old: str
    new: str | None  # None: whatever the operator makes of it
    why: str
    within: str = ""  # part of the statement, where the expression alone says too little

    def fits(self, mutant):
        """Whether a mutant is meant."""
        same = (self.function, self.operator, self.old) == mutant[1:4]
        return same and self.new in (None, mutant.new) and self.within in mutant.statement


NOT_STORED = "lanes that the mask turns off are never stored"
NOT_LOADED = "lanes that the mask turns off only make addresses that are never read"
NOT_REACHED = "what is read for no further iteration is never used"
CHOICE = "only chooses between two ways to the same result"
NO_SHAPE = "the kernel itself makes zeros, or an empty launch nothing: this saves a launch"
NEVER_READ = "without a bias or a transpose its pointer is never read"
SAME_ZERO = "differs at zero, which is what it is replaced by"
WORK = "the masks stop what the test would have skipped"
ALWAYS_FP32 = "in the interpreter kernels store fp32 whatever the dtype"
PROMOTED = "the first sum promotes the accumulator to fp32 (compiled, it is a type error)"
SHIFT_FITS = "a tap's shift, counted in 16-byte loads, passes 2^31 in images of 2^33 elements alone"
CARRIED = "the token's index is int64 and carries the sum; alone it needs rows of 2^31 numbers"
FEW_PARTS = "tokens are cut into parts only when a few hundred programs hold the whole output"

ANY_DESCRIPTOR = "the interpreter takes descriptors of any alignment; tests/launch tells"

EQUIVALENT = (
    # bsr_conv2d_wgrad
    Equivalent(
        "bsr_conv2d_wgrad", "condition dropped", "whole or cut.parts > 1", None, ALWAYS_FP32
    ),
    # bsr_spmm
    Equivalent(
        "_finish",
        "other dropped",
        "tl.load(bias_ptr + n * sb, mask=n < N, other=0.0)",
        None,
        NOT_STORED,
    ),
    Equivalent("_finish", "comparison", "acc < 0", "acc <= 0", SAME_ZERO),
    Equivalent(
        "_bsr_spmm_tma_kernel",
        "other dropped",
        "tl.load(perm_ptr + lo, mask=lo < hi, other=0)",
        None,
        NOT_REACHED,
    ),
    Equivalent(
        "_bsr_spmm_tma_kernel",
        "other dropped",
        "tl.load(index_ptr + lo, mask=lo < hi, other=0)",
        None,
        NOT_REACHED,
    ),
    Equivalent(
        "_bsr_spmm_tma_kernel",
        "other dropped",
        "tl.load(perm_ptr + t, mask=t < hi, other=0)",
        None,
        NOT_REACHED,
    ),
    Equivalent(
        "_bsr_spmm_tma_kernel",
        "other dropped",
        "tl.load(index_ptr + t, mask=t < hi, other=0)",
        None,
        NOT_REACHED,
    ),
    Equivalent(
        "_bsr_spmm_kernel",
        "other dropped",
        "tl.load(index_ptr + t, mask=t < hi, other=0)",
        None,
        NOT_LOADED,
    ),
    Equivalent(
        "_bsr_spmm_kernel",
        "other dropped",
        "tl.load(perm_ptr + t, mask=t < hi, other=0)",
        None,
        NOT_LOADED,
    ),
    Equivalent(
        "_cut",
        "condition dropped",
        "x.shape[1] % reduce == 0 and reduce * x.element_size() >= _TMA_ROW_BYTES "
        "and tma_fits(values.view(-1, bw), y) and (copied or tma_fits(x))",
        "x.shape[1] % reduce == 0 and tma_fits(values.view(-1, bw), y) and (copied or tma_fits(x))",
        CHOICE,
    ),
    Equivalent("_cut", "condition dropped", "copied or tma_fits(x)", None, CHOICE),
    Equivalent(
        "_cut",
        "condition dropped",
        "x.shape[1] % reduce == 0 and reduce * x.element_size() >= _TMA_ROW_BYTES"
        " and tma_fits(values.view(-1, bw), y) and (copied or tma_fits(x))",
        "x.shape[1] % reduce == 0 and reduce * x.element_size() >= _TMA_ROW_BYTES"
        " and (copied or tma_fits(x))",
        ANY_DESCRIPTOR,
    ),
    Equivalent(
        "_cut",
        "grid smaller",
        "trans, compiled = (side.perm is not None, not is_interpreted(_bsr_spmm_kernel))",
        None,
        "no grid, and asked about compiled kernels alone",
    ),
    Equivalent(
        "_bsr_spmm_kernel", "condition dropped", "K_UNIT == 1 and (not TRANS)", None, CHOICE
    ),
    Equivalent("_cut", "constant", "0", "1", CHOICE, "x.shape[1] % reduce"),
    Equivalent(
        "_cut",
        "comparison",
        "reduce * x.element_size() >= _TMA_ROW_BYTES",
        None,
        CHOICE,
    ),
    # bsr_sddmm
    Equivalent(
        "_bsr_sddmm_kernel",
        "other dropped",
        "tl.load(col_ptr + t, mask=t < hi, other=0)",
        None,
        NOT_LOADED,
    ),
    Equivalent(
        "store_sums", "other dropped", "tl.load(dw, mask=mine, other=0.0)", None, NOT_STORED
    ),
    Equivalent(
        "_bsr_sddmm_kernel", "int64 dropped", "tl.program_id(1).to(tl.int64)", None, FEW_PARTS
    ),
    Equivalent("_bsr_sddmm_kernel", "comparison", "lo < hi", "lo <= hi", WORK),
    Equivalent("_bsr_sddmm_tma_kernel", "comparison", "lo < hi", "lo <= hi", WORK),
    Equivalent("_bsr_sddmm_tma_kernel", "constant", "2", "1", CHOICE, "_sum_blocks("),
    Equivalent(
        "bsr_sddmm", "constant", "0", "1", "a block has 256 elements at least", "dw.numel() > 0"
    ),
    Equivalent(
        "_sum_blocks", "arithmetic", "hi - lo", "hi + lo", "stands in a branch that says the same"
    ),
    Equivalent(
        "bsr_sddmm",
        "condition dropped",
        "out is not None and out.dtype in (storable, torch.float32)",
        None,
        "adds and rounds once either way; the interpreter's casts alone differ",
    ),
    Equivalent(
        "_cut",
        "condition dropped",
        "min(block) >= _TMA_EDGE and M > 0 and all(map(_tma_fits, (dy, x)))",
        None,
        ANY_DESCRIPTOR,
    ),
    Equivalent("_cut", "comparison", "min(block) >= _TMA_EDGE", None, CHOICE),
    *(Equivalent("_cut", "name swapped", name, None, CHOICE, "find(") for name in ("min", "max")),
    Equivalent("_cut", "name swapped", "max", None, CHOICE, "G = "),
    *(
        Equivalent("_cut", "arithmetic", old, None, CHOICE, "loads =")
        for old in (
            "(bh + G * bw) * tile.BM * x.element_size()",
            "(bh + G * bw) * tile.BM",
            "bh + G * bw",
            "G * bw",
        )
    ),
    *(
        Equivalent("_cut", "arithmetic", old, None, CHOICE, "parts = parts_of_sum")
        for old in ("nnzb * bh * bw", "nnzb * bh")
    ),
    *(
        Equivalent("_cut", *fault, CHOICE, "step = min(images_at_once")
        for fault in (
            ("arithmetic", "2 ** 31 - 1", None),
            ("name swapped", "max", None),
            ("constant", "1", None),
            ("constant", "2", None),
        )
    ),
    *(
        Equivalent("_tma_fits", *fault, CHOICE)
        for fault in (
            (
                "branch fixed",
                "tma_fits(a) if has_aligned_rows(a) else max(a.shape) < 2 ** 31",
                "tma_fits(a)",
            ),
            ("comparison", "max(a.shape) < 2 ** 31", None),
            ("name swapped", "max", None),
        )
    ),
    Equivalent(
        "clear",
        "accumulator fp16",
        "tl.zeros(padding.shape, dtype=dw.dtype.element_ty)",
        None,
        "a zero is a zero",
    ),
    Equivalent(
        "_sum_blocks",
        "other dropped",
        "tl.load(col_ptr + lo + g, mask=lo + g < hi, other=_NO_COLUMN)",
        None,
        "a tile that is loaded for nothing",
    ),
    Equivalent(
        "group_of_program",
        "constant",
        "1",
        "0",
        "only programs without a group divide by it",
        "groups = tl.maximum",
    ),
    Equivalent(
        "slots_of_program",
        "arithmetic",
        "left + R - 1",
        None,
        "the search rules out what it reads beyond the last row",
    ),
    *(Equivalent("_cut", "constant", old, None, CHOICE, "copied =") for old in ("0", "1")),
    # parts
    Equivalent(
        "_add_parts_kernel",
        "other dropped",
        "tl.load(out_ptr + at, mask=at < n, other=0.0)",
        None,
        NOT_STORED,
    ),
    Equivalent(
        "_add_parts_kernel",
        "int64 dropped",
        "tl.program_id(0).to(tl.int64)",
        None,
        "a weight of 2**31 numbers is not tested",
    ),
    Equivalent(
        "_add_parts_kernel",
        "accumulator fp16",
        "tl.zeros([BLOCK], dtype=tl.float32)",
        None,
        PROMOTED,
    ),
    # bsr_conv2d_wgrad
    Equivalent(
        "_cut",
        "branch fixed",
        "0 if has_pixel_rows(a, window.groups) else a.shape[1:].numel()",
        "a.shape[1:].numel()",
        CHOICE,
    ),
    # bsr_grow
    Equivalent("bsr_grow", "condition dropped", "M == 0 or R * C == 0", None, NO_SHAPE),
    *(
        Equivalent("_bsr_grow_kernel", "int64 dropped", f"{at}.to(tl.int64)", at, CARRIED)
        for at in ("n0", "k0")
    ),
    # csr_sddmm
    Equivalent("_csr_sddmm_kernel", "comparison", "lo < hi", "lo <= hi", WORK),
    Equivalent(
        "_csr_sddmm_kernel",
        "other dropped",
        "tl.load(col_ptr + t, mask=live, other=0)",
        None,
        NOT_LOADED,
    ),
    Equivalent(
        "_csr_sddmm_kernel",
        "accumulator fp16",
        "tl.zeros([BN, BM], dtype=tl.float32)",
        None,
        PROMOTED,
    ),
    Equivalent(
        "_csr_sddmm_kernel",
        "conjunct dropped",
        "live[:, None] & (m < M)[None, :]",
        "(m < M)[None, :]",
        NOT_STORED,
    ),
    Equivalent(
        "_csr_sddmm_kernel",
        "int64 dropped",
        "tl.arange(0, BM).to(tl.int64)",
        None,
        "tokens lie side by side: their stride is 0 or 1",
    ),
    Equivalent(
        "_csr_sddmm_kernel", "int64 dropped", "tl.program_id(1).to(tl.int64)", None, FEW_PARTS
    ),
    Equivalent(
        "_csr_sddmm_kernel",
        "other dropped",
        "tl.load(dw_ptr + slot, mask=live, other=0.0)",
        None,
        NOT_STORED,
    ),
    Equivalent(
        "csr_sddmm",
        "condition dropped",
        "out is None and parts == 1 and (chunk == M)",
        None,
        ALWAYS_FP32,
    ),
    Equivalent("csr_sddmm", "comparison", "parts == 1", None, ALWAYS_FP32, "whole ="),
    Equivalent("csr_sddmm", "comparison", "chunk == M", None, ALWAYS_FP32, "whole ="),
    Equivalent("csr_sddmm", "constant", "1", None, ALWAYS_FP32, "whole ="),
    Equivalent(
        "csr_sddmm",
        "branch fixed",
        "output_dtype(x.dtype, _csr_sddmm_kernel) if whole else torch.float32",
        None,
        ALWAYS_FP32,
    ),
    Equivalent(
        "csr_sddmm", "branch fixed", "dw[0] if parts == 1 else dw.sum(0)", "dw.sum(0)", CHOICE
    ),
    # bsr_conv2d_wgrad
    Equivalent("_bsr_conv2d_wgrad_kernel", "comparison", "lo < hi", "lo <= hi", WORK),
    Equivalent(
        "_bsr_conv2d_wgrad_kernel",
        "conjunct dropped",
        "(ch < width) & (t < hi)",
        "ch < width",
        NOT_STORED,
    ),
    Equivalent("_bsr_conv2d_wgrad_kernel", "comparison", "t < hi", "t <= hi", NOT_STORED, "h ="),
    Equivalent(
        "_bsr_conv2d_wgrad_kernel",
        "other dropped",
        "tl.load(col_ptr + lo + u, mask=lo + u < hi, other=0)",
        None,
        NOT_LOADED,
    ),
    Equivalent(
        "_bsr_conv2d_wgrad_kernel",
        "int64 dropped",
        "tl.program_id(1).to(tl.int64)",
        None,
        FEW_PARTS,
    ),
    # csr_conv2d_wgrad
    Equivalent("_csr_conv2d_wgrad_kernel", "comparison", "lo < hi", "lo <= hi", WORK),
    Equivalent(
        "_csr_conv2d_wgrad_kernel",
        "accumulator fp16",
        "tl.zeros([BN, BM], dtype=tl.float32)",
        None,
        PROMOTED,
    ),
    Equivalent(
        "_csr_conv2d_wgrad_kernel",
        "int64 dropped",
        "tl.program_id(1).to(tl.int64)",
        None,
        FEW_PARTS,
    ),
    *(
        Equivalent(function, *fault, ALWAYS_FP32, "whole =")
        for function in ("csr_conv2d_wgrad",)
        for fault in (
            ("condition dropped", "parts == 1 and step >= batch", None),
            ("comparison", "parts == 1", None),
            ("comparison", "step >= batch", None),
            ("constant", "1", None),
        )
    ),
    *(
        Equivalent(
            wgrad,
            "branch fixed",
            f"output_dtype(x.dtype, _{wgrad}_kernel) if whole else torch.float32",
            None,
            ALWAYS_FP32,
        )
        for wgrad in ("csr_conv2d_wgrad",)
    ),
    *(
        Equivalent(wgrad, "branch fixed", "dw[0] if parts == 1 else dw.sum(0)", "dw.sum(0)", CHOICE)
        for wgrad in ("csr_conv2d_wgrad",)
    ),
    *(
        Equivalent(wgrad, "constant", "1", "0", CHOICE, "dw.sum(0)")
        for wgrad in ("csr_conv2d_wgrad",)
    ),
    *(
        Equivalent(
            wgrad,
            "condition dropped",
            "dw.numel() == 0 or dy.numel() == 0",
            "dy.numel() == 0",
            NO_SHAPE,
        )
        for wgrad in ("bsr_conv2d_wgrad", "csr_conv2d_wgrad")
    ),
    Equivalent("bsr_conv2d_wgrad", "constant", "0", "1", NO_SHAPE, "dw.numel() == 0"),
    # bsr_conv2d
    Equivalent("_bsr_conv2d_kernel", "int64 dropped", "dh.to(tl.int64)", "dh", SHIFT_FITS),
    Equivalent("_bsr_conv2d_kernel", "int64 dropped", "dw.to(tl.int64)", "dw", SHIFT_FITS),
    Equivalent("_bsr_conv2d_dgrad_kernel", "int64 dropped", "w.to(tl.int64)", "w", SHIFT_FITS),
    *(
        Equivalent(
            function, "other dropped", f"tl.load({name}_ptr + t, mask={live}, other=0)", None, why
        )
        for function, name, live, why in (
            ("_bsr_conv2d_kernel", "index", "t < hi", NOT_LOADED),
            ("_bsr_conv2d_dgrad_kernel", "index", "i < total", NOT_LOADED),
            ("_bsr_conv2d_dgrad_kernel", "perm", "i < total", NOT_LOADED),
        )
    ),
    Equivalent("bsr_conv2d_dgrad", "name swapped", "min", "max", CHOICE, "TAPS_AT_ONCE"),
    Equivalent("_bsr_conv2d_kernel", "comparison", "IN >= BK", None, CHOICE),
    Equivalent(
        "_bsr_conv2d_kernel",
        "other dropped",
        "tl.load(bias_ptr + at.to(tl.int64) * sb, mask=o < Cog, other=0.0)",
        None,
        NOT_STORED,
    ),
    Equivalent("_bsr_conv2d_dgrad_kernel", "comparison", "m0 < N * rows * columns", None, WORK),
    Equivalent("_bsr_conv2d_dgrad_kernel", "size swapped", "N", "M", WORK, "if m0 < N"),
    Equivalent(
        "_bsr_conv2d_dgrad_kernel", "branch fixed", "0 * row if WIDE else lane // IN", None, CHOICE
    ),
    Equivalent(
        "_bsr_conv2d_dgrad_kernel",
        "other dropped",
        "tl.load(start_ptr + key, mask=met, other=0)",
        None,
        "the interpreter drops a scalar `other` of 0, of `hi` too; assert_loads_are_filled tells",
    ),
    # csr_conv2d
    Equivalent(
        "_csr_conv2d_kernel",
        "other dropped",
        "tl.load(order_ptr + rank, mask=in_o, other=0)",
        None,
        NOT_LOADED,
    ),
    *(
        Equivalent(
            "_csr_conv2d_kernel",
            "mask dropped",
            f"tl.load(start_ptr + {at}, mask=in_o, other=0)",
            None,
            "lanes beyond the last channel read row 0, which exists",
        )
        for at in ("o", "o + 1")
    ),
    *(
        Equivalent(
            function,
            "accumulator fp16",
            "tl.zeros([BN, BM], dtype=tl.float32)",
            None,
            PROMOTED,
        )
        for function in ("_csr_conv2d_kernel", "_csr_conv2d_dgrad_kernel")
    ),
    # csr_spmm
    Equivalent(
        "_csr_spmm_kernel",
        "other dropped",
        "tl.load(order_ptr + rank, mask=in_n, other=0)",
        None,
        NOT_LOADED,
    ),
    Equivalent(
        "_csr_spmm_kernel",
        "mask dropped",
        "tl.load(start_ptr + n, mask=in_n, other=0)",
        None,
        "lanes beyond the matrix read row 0, which exists",
    ),
    Equivalent(
        "_csr_spmm_kernel",
        "other dropped",
        "tl.load(index_ptr + t, mask=live, other=0)",
        None,
        NOT_LOADED,
    ),
    Equivalent(
        "_csr_spmm_kernel",
        "accumulator fp16",
        "tl.zeros([BN, BM], dtype=tl.float32)",
        None,
        PROMOTED,
    ),
    Equivalent("_csr_spmm_kernel", "comparison", "acc < 0", "acc <= 0", SAME_ZERO),
    Equivalent(
        "_csr_spmm_kernel",
        "int64 dropped",
        "(pid // tiles).to(tl.int64)",
        None,
        "tokens lie side by side: their stride is 0 or 1",
    ),
    Equivalent("_launch", "name swapped", "max", "min", "only bounds the memory of a chunk"),
    Equivalent("_launch", "comparison", "chunk >= M", None, CHOICE),
    Equivalent(
        "_launch",
        "branch fixed",
        "(x, y) if chunk >= M else (x[m:m + chunk], y[m:m + chunk])",
        None,
        CHOICE,
    ),
    Equivalent("_launch", "branch fixed", "index if perm is None else perm", "perm", NEVER_READ),
    *(
        Equivalent(launcher, "branch fixed", f"{x} if bias is None else bias", "bias", NEVER_READ)
        for launcher, x in (("_launch", "rows"), ("bsr_conv2d", "x"), ("csr_conv2d", "x"))
    ),
    *(
        Equivalent(launcher, "constant", "0", "1", NEVER_READ, "0 if bias is None")
        for launcher in ("_launch", "bsr_conv2d", "csr_conv2d")
    ),
)
