"""Gradient descent on a list of factors: `descend`, its solver and history, and the engines that take the steps."""
