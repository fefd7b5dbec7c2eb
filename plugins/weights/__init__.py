"""The frozen weights that recap-cli ships."""
