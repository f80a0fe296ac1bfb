"""Many runs that differ in a few settings, and what comes of them together."""
