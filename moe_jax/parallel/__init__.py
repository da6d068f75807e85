"""The device mesh, and which mesh axis each named array dimension is split over."""
