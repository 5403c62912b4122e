"Groups of processes, for tests that compare several with one"

import contextlib
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tinyclip.core import rank_and_world_size
from tinyclip.train.engine import make_accelerator

# the one process that all others begin in imports these once; nothing in it runs
torch.multiprocessing.get_context('forkserver').set_forkserver_preload(
    ['tinyclip.train.run', 'tinyclip.distill', 'tinyclip.zoo']
)


def spawn(worker, world, *args):
    "Run `worker(rank, world, port, *args)` in each of several processes"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.start_processes(worker, (world, port, *args), nprocs=world, start_method='forkserver')


@contextlib.contextmanager
def joined(rank, world, port):
    "The group of a worker, meanwhile"
    os.environ |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=world)
    yield
    dist.barrier()
    dist.destroy_process_group()


def started(rank, world, port):
    "Join the group of a worker as a run does, through accelerate"
    os.environ |= {
        k: str(v)
        for k, v in dict(
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=port,
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=world,
            LOCAL_WORLD_SIZE=world,
            ACCELERATE_USE_CPU='true',
        ).items()
    }
    torch.set_num_threads(1)
    make_accelerator('fp32', 'cpu')
    assert rank_and_world_size() == (rank, world)
