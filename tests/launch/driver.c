/* A stand-in for libcuda.so.1, NVIDIA's driver library, on a machine without a GPU.
 *
 * Triton's compiler, JIT and launcher run as they are. What they ask of the driver is checked by
 * the driver's own rules, kept for the test to read, and not done: nothing is computed. A call that
 * breaks a rule returns CUDA_ERROR_INVALID_VALUE, and cuGetErrorString names the rule.
 *
 * Rules, by their source:
 *   CUDA Driver API, cuTensorMapEncodeTiled: alignment of map and address, rank, sizes, strides,
 *     box, element strides, width of a box under a swizzle, data types.
 *   CUDA Driver API, cuLaunchKernelEx; CUDA C++ Programming Guide, "Technical Specifications per
 *     Compute Capability", for 9.0: grid up to 2**31 - 1, 65535, 65535; 1024 threads a block; 227 KB
 *     of shared memory, of which more than 48 KB only after CU_FUNC_ATTRIBUTE_
 *     MAX_DYNAMIC_SHARED_SIZE_BYTES was set.
 *   The compiled kernel itself: its ELF image lists its parameters (.nv.info, EIATTR_KPARAM_INFO)
 *     and the threads it was compiled for (EIATTR_REQNTID or EIATTR_MAX_THREADS).
 */
#include "cuda.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_PARAMETERS 64
#define SHARED_LIMIT 232448 /* 227 KB */

struct kernel {
  char name[128];
  int parameters;
  unsigned size[MOST_PARAMETERS];
  unsigned threads; /* that a block may have */
  unsigned shared;  /* dynamic, that a launch may ask for */
};

/* What the last launch was given; read by the test, field for field. */
struct launch {
  char kernel[128];
  unsigned grid[3], block[3], shared;
  uint64_t stream;
  int parameters;
  unsigned size[MOST_PARAMETERS];
  unsigned char bytes[MOST_PARAMETERS * 128];
};

struct launch standin_last;
long standin_launches, standin_maps;

static char rule[512] = "no rule broken";
static char context;

#define REFUSE(...)                                                                               \
  do {                                                                                            \
    snprintf(rule, sizeof rule, __VA_ARGS__);                                                     \
    return CUDA_ERROR_INVALID_VALUE;                                                              \
  } while (0)

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_SUCCESS ? "no error" : rule;
  return CUDA_SUCCESS;
}

/* ---- tensor maps ---- */

static unsigned element_size(CUtensorMapDataType type) {
  switch (type) {
  case CU_TENSOR_MAP_DATA_TYPE_UINT8:
    return 1;
  case CU_TENSOR_MAP_DATA_TYPE_UINT16:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
  case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
    return 2;
  case CU_TENSOR_MAP_DATA_TYPE_UINT32:
  case CU_TENSOR_MAP_DATA_TYPE_INT32:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
  case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
  case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ:
    return 4;
  case CU_TENSOR_MAP_DATA_TYPE_UINT64:
  case CU_TENSOR_MAP_DATA_TYPE_INT64:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
    return 8;
  default:
    return 0;
  }
}

/* What the map of a real driver hides: here in the clear, so that two maps can be compared. */
struct contents {
  uint64_t address, dimension[2], stride;
  uint32_t rank, type, box[2], swizzle, interleave, promotion, fill;
};

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *dimension,
                                const cuuint64_t *stride, const cuuint32_t *box,
                                const cuuint32_t *element_stride, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  unsigned size = element_size(type), span = 0;
  uint64_t width = 0;
  standin_maps++;
  if ((uintptr_t)map % 64)
    REFUSE("tensor map: tensorMap must be aligned to 64 bytes; got %p", (void *)map);
  if (size == 0)
    REFUSE("tensor map: unknown tensorDataType %d", (int)type);
  if (rank < 1 || rank > 5)
    REFUSE("tensor map: tensorRank must be 1 to 5; got %u", rank);
  if ((uintptr_t)address % 16)
    REFUSE("tensor map: globalAddress must be aligned to 16 bytes; got %p", address);
  for (unsigned i = 0; i < rank; i++) {
    if (dimension[i] == 0 || dimension[i] > 1ull << 32)
      REFUSE("tensor map: globalDim[%u] must be 1 to 2**32; got %llu", i,
             (unsigned long long)dimension[i]);
    if (box[i] == 0 || box[i] > 256)
      REFUSE("tensor map: boxDim[%u] must be 1 to 256; got %u", i, box[i]);
    if (element_stride[i] == 0 || element_stride[i] > 8)
      REFUSE("tensor map: elementStrides[%u] must be 1 to 8; got %u", i, element_stride[i]);
  }
  width = dimension[0] * size;
  for (unsigned i = 0; i + 1 < rank; i++) {
    if (stride[i] % 16 || stride[i] >= 1ull << 40)
      REFUSE("tensor map: globalStrides[%u] must be a multiple of 16 below 2**40; got %llu", i,
             (unsigned long long)stride[i]);
    if (stride[i] < width)
      REFUSE("tensor map: globalStrides[%u] must be at least %llu bytes; got %llu", i,
             (unsigned long long)width, (unsigned long long)stride[i]);
    width = stride[i] * dimension[i + 1];
  }
  if (interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && box[0] * size % 16)
    REFUSE("tensor map: boxDim[0] must be a multiple of 16 bytes; got %u", box[0] * size);
  span = swizzle == CU_TENSOR_MAP_SWIZZLE_32B    ? 32
         : swizzle == CU_TENSOR_MAP_SWIZZLE_64B  ? 64
         : swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128
                                                 : 0;
  if (span && box[0] * size > span)
    REFUSE("tensor map: boxDim[0] must fit the swizzle of %u bytes; got %u", span, box[0] * size);
  struct contents seen = {(uintptr_t)address,
                          {dimension[0], rank > 1 ? dimension[1] : 0},
                          rank > 1 ? stride[0] : 0,
                          rank,
                          (uint32_t)type,
                          {box[0], rank > 1 ? box[1] : 0},
                          (uint32_t)swizzle,
                          (uint32_t)interleave,
                          (uint32_t)promotion,
                          (uint32_t)fill};
  memset(map, 0, sizeof *map);
  memcpy(map, &seen, sizeof seen);
  return CUDA_SUCCESS;
}

/* ---- modules: one kernel in each ---- */

struct section {
  uint32_t name, type;
  uint64_t flags, address, offset, size;
  uint32_t link, info;
  uint64_t alignment, entry;
};

/* Read the attributes of a kernel: format, attribute, length, value. */
static void read_attributes(struct kernel *kernel, const unsigned char *data, uint64_t size) {
  for (uint64_t at = 0; at + 4 <= size;) {
    unsigned format = data[at], attribute = data[at + 1], length;
    uint32_t word;
    memcpy(&word, data + at, 4);
    length = word >> 16;
    if (format != 4) { /* its value stands in place of a length */
      at += 4;
      continue;
    }
    if (attribute == 0x17) { /* EIATTR_KPARAM_INFO */
      uint32_t bits;
      unsigned ordinal = data[at + 8] | data[at + 9] << 8;
      memcpy(&bits, data + at + 12, 4);
      if (ordinal < MOST_PARAMETERS) {
        kernel->size[ordinal] = bits >> 18;
        if ((int)ordinal >= kernel->parameters)
          kernel->parameters = (int)ordinal + 1;
      }
    }
    if (attribute == 0x05 || attribute == 0x10) { /* EIATTR_MAX_THREADS, EIATTR_REQNTID */
      uint32_t threads[3];
      memcpy(threads, data + at + 4, 12);
      kernel->threads = threads[0] * threads[1] * threads[2];
    }
    at += 4 + length;
  }
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const unsigned char *elf = image;
  uint64_t table;
  uint16_t count, names;
  struct section strings, found;
  struct kernel *kernel = calloc(1, sizeof *kernel);
  if (memcmp(elf, "\177ELF", 4))
    REFUSE("module: no ELF image");
  memcpy(&table, elf + 0x28, 8);
  memcpy(&count, elf + 0x3c, 2);
  memcpy(&names, elf + 0x3e, 2);
  memcpy(&strings, elf + table + names * sizeof strings, sizeof strings);
  kernel->threads = 1024;
  kernel->shared = 48 * 1024;
  for (unsigned i = 0; i < count; i++) {
    const char *name;
    memcpy(&found, elf + table + i * sizeof found, sizeof found);
    name = (const char *)elf + strings.offset + found.name;
    if (!strncmp(name, ".nv.info.", 9)) {
      snprintf(kernel->name, sizeof kernel->name, "%s", name + 9);
      read_attributes(kernel, elf + found.offset, found.size);
    }
  }
  if (!kernel->name[0])
    REFUSE("module: no kernel in it");
  *module = (CUmodule)kernel;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  struct kernel *kernel = (struct kernel *)module;
  if (strcmp(name, kernel->name))
    REFUSE("module: it has %s; asked for %s", kernel->name, name);
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; } /* its launches are still read */

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  struct kernel *kernel = (struct kernel *)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? (int)kernel->threads : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value > SHARED_LIMIT)
      REFUSE("function: shared memory is at most %d bytes; asked for %d", SHARED_LIMIT, value);
    ((struct kernel *)function)->shared = (unsigned)value;
  } else if (attribute != CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED) {
    REFUSE("function: attribute %d is unknown", (int)attribute); /* newer than this driver */
  }
  return CUDA_SUCCESS;
}

/* ---- launches ---- */

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                          void **extra) {
  const struct kernel *kernel = (const struct kernel *)function;
  const unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const unsigned block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  const unsigned long long most[3] = {2147483647, 65535, 65535};
  unsigned char *to = standin_last.bytes;
  for (int i = 0; i < 3; i++)
    if (grid[i] == 0 || grid[i] > most[i])
      REFUSE("launch: gridDim[%d] must be 1 to %llu; got %u", i, most[i], grid[i]);
  if (block[0] * block[1] * block[2] == 0 || block[0] * block[1] * block[2] > kernel->threads)
    REFUSE("launch: %s takes 1 to %u threads a block; got %u x %u x %u", kernel->name,
           kernel->threads, block[0], block[1], block[2]);
  if (config->sharedMemBytes > kernel->shared)
    REFUSE("launch: %s may use %u bytes of shared memory; asked for %u", kernel->name,
           kernel->shared, config->sharedMemBytes);
  for (int i = 0; i < kernel->parameters; i++)
    if (parameters[i] == NULL)
      REFUSE("launch: %s takes %d parameters; number %d is missing", kernel->name,
             kernel->parameters, i);
  standin_launches++;
  memcpy(standin_last.kernel, kernel->name, sizeof kernel->name);
  memcpy(standin_last.grid, grid, sizeof grid);
  memcpy(standin_last.block, block, sizeof block);
  standin_last.shared = config->sharedMemBytes;
  standin_last.stream = (uint64_t)(uintptr_t)config->hStream;
  standin_last.parameters = kernel->parameters;
  memcpy(standin_last.size, kernel->size, sizeof kernel->size);
  for (int i = 0; i < kernel->parameters; i++) {
    memcpy(to, parameters[i], kernel->size[i]);
    to += kernel->size[i];
  }
  return CUDA_SUCCESS;
}

/* ---- what else Triton asks ---- */

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    *value = SHARED_LIMIT;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    *value = SHARED_LIMIT + 1024;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    *value = 65536;
    break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
    *value = 132;
    break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    *value = 32;
    break;
  default:
    *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *current) {
  *current = (CUcontext)&context;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxRetain(CUcontext *current, CUdevice device) {
  *current = (CUcontext)&context;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function,
                                      const CUlaunchConfig *config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

#undef cuPointerGetAttribute
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer; /* memory of this machine stands for the GPU's */
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
