"""``python -m dreamlip_train``, ``deepspeed --module dreamlip_train`` and ``torchrun -m dreamlip_train``."""

from dreamlip_train.cli import main

if __name__ == "__main__":
    main()
