"""Scripts that measure, and the figures that they last gave (README.md)."""
