"""The forwards: layer by layer, in torch, compiled, and transformers' own."""
