"""What is done to a diffusers UNet around its attention: fewer kernels, less memory."""
