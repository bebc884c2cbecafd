"""Models: loaded, taken apart, cut, adapted and saved."""
