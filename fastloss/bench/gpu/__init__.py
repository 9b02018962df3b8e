"""The stages of bench/gpu_day.py (`make gpu`): what is asked of a GPU in one visit. Each runs in a process of its own."""
