"""What every other part may use: errors, files, images."""
