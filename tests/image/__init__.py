"""The container image, tried out: `make test-image`."""
