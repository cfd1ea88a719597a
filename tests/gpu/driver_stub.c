/* A CUDA runtime without a device: one GPU that accepts everything and does nothing.

   Preloaded, it lets PyTorch's autograd engine run on fake tensors (FakeTensorMode) of the device
   "cuda": streams and events are no-ops, no memory is allocated, no kernel is launched. */
#include <string.h>

#define NO_OP(name) int name(void) { return 0; }

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return 0;
}
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
  *stream = (void *)1;
  return 0;
}
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { *status = 0; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)1; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaMemGetInfo(unsigned long *free, unsigned long *total) {
  *free = *total = 1ul << 37;
  return 0;
}
NO_OP(cudaSetDevice)
NO_OP(cudaEventDestroy)
NO_OP(cudaEventQuery)
NO_OP(cudaEventRecord)
NO_OP(cudaEventSynchronize)
NO_OP(cudaStreamWaitEvent)
NO_OP(cudaStreamQuery)
NO_OP(cudaStreamSynchronize)
NO_OP(cudaDeviceSynchronize)
NO_OP(cudaThreadExchangeStreamCaptureMode)
NO_OP(cudaGetLastError)
NO_OP(cudaPeekAtLastError)

/* The driver's functions, which the runtime is asked for by name. */
static int no_op(void) { return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                     unsigned long long flags, int *found) {
  *function = strstr(name, "PrimaryCtxGetState") ? (void *)cuDevicePrimaryCtxGetState
                                                 : (void *)no_op;
  if (found) *found = 0;
  return 0;
}
