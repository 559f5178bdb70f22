"""The maths of AWQ on tensors. Knows no modules and no files, and computes on the device where its inputs are."""
