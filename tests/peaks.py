"""The memory of a program that a test starts, measured by the program itself."""

PEAK = """
def peak():
    # In bytes. What getrusage tells begins with the memory of the process that started this one.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))

"""
"""Defines `peak()`, to be put before a program's text."""
