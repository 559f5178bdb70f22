"""Pure maths of AWQ on tensors: no module, no file, no choice of device."""
