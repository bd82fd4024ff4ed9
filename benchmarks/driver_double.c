/* A stand-in for NVIDIA's libcuda.so.1: it does no work and notes every kernel launch, so that what
 * a launch costs, and what it is given, can be seen without a GPU. */
#include <cuda.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define OK CUDA_SUCCESS
#define MOST_KERNELS 4096
#define MOST_PARAMETERS 512

static struct {
  int count;
  int sizes[MOST_PARAMETERS];
} kernels[MOST_KERNELS];
static uintptr_t kernel_count = 1;

static char* noted;
static size_t noted_bytes, room;
static int noting;

static void note(const void* bytes, size_t size) {
  if (noted_bytes + size > room) {
    room = 2 * (noted_bytes + size);
    noted = realloc(noted, room);
  }
  memcpy(noted + noted_bytes, bytes, size);
  noted_bytes += size;
}

/* The sizes in bytes of a kernel's parameters, without which its launches are not noted. */
void double_describe(uint64_t kernel, const int* sizes, int count) {
  kernels[kernel].count = count;
  memcpy(kernels[kernel].sizes, sizes, sizeof(int) * count);
}

void double_start(void) {
  noting = 1;
  noted_bytes = 0;
}

/* Launches since double_start: kernel, grid and shared memory as six int32, then the parameters. */
const char* double_stop(size_t* size) {
  noting = 0;
  *size = noted_bytes;
  return noted;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction f, void** parameters, void** extra) {
  (void)extra;
  uintptr_t kernel = (uintptr_t)f;
  if (!noting) return OK;
  int32_t head[6] = {(int32_t)kernel,           (int32_t)config->gridDimX,  (int32_t)config->gridDimY,
                     (int32_t)config->gridDimZ, (int32_t)config->blockDimX, (int32_t)config->sharedMemBytes};
  note(head, sizeof head);
  for (int i = 0; i < kernels[kernel].count; ++i) note(parameters[i], kernels[kernel].sizes[i]);
  return OK;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  (void)steps, (void)interleave, (void)promotion, (void)fill;
  uint64_t* words = (uint64_t*)map;
  memset(map, 0, sizeof *map);
  words[0] = (uint64_t)address;
  words[1] = (uint64_t)type << 32 | (uint64_t)swizzle << 16 | rank;
  for (cuuint32_t i = 0; i < rank; ++i) words[2 + i] = dims[i] << 20 | box[i];
  for (cuuint32_t i = 0; i + 1 < rank; ++i) words[7 + i] = strides[i];
  return OK;
}

CUresult cuModuleGetFunction(CUfunction* f, CUmodule module, const char* name) {
  (void)module, (void)name;
  if (kernel_count >= MOST_KERNELS) return CUDA_ERROR_OUT_OF_MEMORY;
  *f = (CUfunction)kernel_count++;
  return OK;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN      ? 232448
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR ? 233472
           : attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT                 ? 132
                                                                                   : 65536;
  return OK;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction f) {
  (void)f;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return OK;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  (void)attribute;
  *(CUdeviceptr*)value = pointer;
  return OK;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  (void)error;
  *text = "an error of the stand-in for libcuda";
  return OK;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return OK;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  (void)image;
  *module = (CUmodule)1;
  return OK;
}

CUresult cuCtxSetCurrent(CUcontext c) { return (void)c, OK; }
CUresult cuCtxGetLimit(size_t* n, CUlimit l) { return (void)l, *n = 0, OK; }
CUresult cuCtxSetLimit(CUlimit l, size_t n) { return (void)l, (void)n, OK; }
CUresult cuDeviceGet(CUdevice* d, int i) { return *d = i, OK; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) { return (void)d, *c = (CUcontext)1, OK; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int n) {
  return (void)f, (void)a, (void)n, OK;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return (void)f, (void)c, OK; }
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction f, const CUlaunchConfig* c) {
  return (void)f, (void)c, *n = 1, OK;
}
CUresult cuDriverGetVersion(int* version) { return *version = 13020, OK; }
CUresult cuCtxGetDevice(CUdevice* d) { return *d = 0, OK; }
CUresult cuModuleUnload(CUmodule m) { return (void)m, OK; }
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus* status) {
  return (void)s, *status = CU_STREAM_CAPTURE_STATUS_NONE, OK;
}
