"""The kernels of fastloss: `cpu` in Numba, `cuda` in Triton, twins. Installed as `fastloss.kernels`."""

if __name__ == "kernels":
    raise ImportError("kernels is a part of fastloss: import fastloss.kernels (from a checkout: pip install -e .)")
