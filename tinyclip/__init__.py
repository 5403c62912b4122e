"Small CLIPs out of large ones: affinity mimicking and weight inheritance (TinyCLIP, Wu et al., ICCV 2023)"
__version__ = "0.1.0"

from tinyclip.towers.architecture import register as _register

_register() # open_clip.create_model("TinyCLIP-...") works once tinyclip is imported
