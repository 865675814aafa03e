"""TensorRT, TensorRT for RTX and Torch-TensorRT."""
