"""Build, generate, load and augment data sets."""
