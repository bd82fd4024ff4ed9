"""What every op stands on: the choice of a backend, checks, the native libraries, the op itself."""
