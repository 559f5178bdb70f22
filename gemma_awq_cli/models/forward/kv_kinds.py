"""The ways to hold keys and values in memory, by the names that users give them."""

KV_16BIT, KV_INT8 = "16bit", "int8"
KV_CACHES = (KV_16BIT, KV_INT8)
