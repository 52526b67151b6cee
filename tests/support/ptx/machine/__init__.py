"""What code runs on: its instructions as read, blocks of registers and threads, global and shared memory, and the
table of what executes which instruction. Knows no instruction itself.
"""
