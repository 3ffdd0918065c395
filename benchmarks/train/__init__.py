"""The contestants of bench_train.py, and what they train on."""
