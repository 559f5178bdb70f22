"""How far a quantized model's predictions are from the 16-bit model's."""
