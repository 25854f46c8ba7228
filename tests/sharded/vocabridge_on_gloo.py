"""The command line under DeepSpeed on a CPU, without the collectives that it would compile for a minute."""

import deepspeed

from vocabridge.cli import main

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
main()
