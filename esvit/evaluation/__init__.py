"""Measures of a frozen backbone (features, k-NN) and label-free signs of health."""
