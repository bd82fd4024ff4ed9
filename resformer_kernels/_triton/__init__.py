"""What every Triton backend stands on. Imports without Triton, as does its module `available`."""
