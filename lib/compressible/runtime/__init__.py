"""The ground all rooms stand on: devices, paths, progress bars, checks of arguments, questions on layers."""
