"""What runs on a GPU: functions in Triton's own dialect, apart from the Python that launches them."""
