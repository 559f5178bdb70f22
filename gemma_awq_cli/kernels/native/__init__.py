"""C++ for CPUs, compiled once by the compiler that is there; everything works without one, more slowly."""
