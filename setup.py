"""pip install --no-build-isolation .

Compiles the native operators ahead of time, from the same sources and with the same flags as at first use.
CAPS_BUILD=0 leaves that out; where the compiler fails, the installation goes on without, and caps.py says so when it
runs. TORCH_CUDA_ARCH_LIST="8.0;9.0" compiles the CUDA part on a machine without a GPU.
"""
import os
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
ONNX = ["onnx", "onnxruntime", "onnxscript"]


def extension():
    """Keyword arguments of setup() for the extension module; none where torch is not there to build against."""
    if os.environ.get("CAPS_BUILD") == "0" or sys.platform == "win32":  # the operators are for Linux and macOS
        return {}
    sys.path.insert(0, str(HERE))
    try:
        import pybind11
        from csrc import extension as native
    except ImportError as error:
        print(f"caps: built without the native operators ({error}); use --no-build-isolation", file=sys.stderr)
        return {}

    def module(codes):
        arguments = native.compile_arguments(codes)
        with native.builder() as cpp_extension:
            return (cpp_extension.CUDAExtension if codes else cpp_extension.CppExtension)(
                "caps_native", [os.path.relpath(source, HERE) for source in native.sources(arguments)],
                include_dirs=[pybind11.get_include()], extra_compile_args=arguments, optional=not codes)

    class Build(native.toolkit.cpp_extension().BuildExtension):
        def build_extensions(self):
            for codes in dict.fromkeys([native.toolkit.cuda()[0], ()]):  # where CUDA's part fails, for the CPU alone
                vars(self.extensions[0]).update(vars(module(codes)))  # it keeps what the command has added
                try:
                    with native.builder():
                        return super().build_extensions()
                except Exception as error:  # without a compiler torch's checks fail before `optional` counts
                    lost = "its CUDA part" if codes else "the native operators"
                    print(f"caps: built without {lost} ({native.complaint(error)})", file=sys.stderr)

    return {"ext_modules": [module(())], "cmdclass": {"build_ext": Build}}


setup(
    name="capsnet-exact",  # `caps` belongs to another project on the package index; the module stays caps
    version="1.0.0",
    description="Capsule networks in PyTorch with exact, fused dynamic routing",
    python_requires=">=3.10",
    py_modules=["caps"],
    packages=["caps_parts.csrc", "caps_parts.extras"],  # where caps.__path__ looks for them
    package_dir={"caps_parts.csrc": "csrc", "caps_parts.extras": "extras"},
    package_data={"caps_parts.csrc": [f"{folder}*.{kind}" for folder in ("", "cpu/", "cuda/")
                                      for kind in ("cpp", "h", "cu")],
                  "caps_parts.extras": ["networks/*.pt"]},
    entry_points={"console_scripts": ["caps = caps:program"]},
    install_requires=["torch>=2.11,<2.15", "torchvision>=0.26,<0.30", "numpy", "matplotlib", "scikit-learn", "scipy",
                      "tqdm", "mlxtend", "pillow", "pybind11", "ninja"],
    extras_require={"onnx": ONNX, "test": ["pytest", *ONNX]},
    **extension(),
)
