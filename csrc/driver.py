"""Prints the CUDA version of the driver and the compute capability of every visible GPU: "CUDA 13000", "GPU 9.0".

A program of its own, without torch: asking initialises CUDA, and what a process that has done so forks can use CUDA no
more. And it is the driver that knows what CUDA_VISIBLE_DEVICES, whose entries may be parts of GPUs, comes to.
"""
import ctypes
import sys

NO_DEVICE, MAJOR, MINOR = 100, 75, 76  # CUDA_ERROR_NO_DEVICE, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR

driver = ctypes.CDLL("libcuda.so.1")


def check(status):
    if status == NO_DEVICE:
        sys.exit()
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        sys.exit((text.value or b"error %d" % status).decode())


def ask(function, *arguments):
    number = ctypes.c_int()
    check(getattr(driver, function)(ctypes.byref(number), *arguments))
    return number.value


print("CUDA", ask("cuDriverGetVersion"))
check(driver.cuInit(0))
for i in range(ask("cuDeviceGetCount")):
    device = ask("cuDeviceGet", i)
    print(f"GPU {ask('cuDeviceGetAttribute', MAJOR, device)}.{ask('cuDeviceGetAttribute', MINOR, device)}")
