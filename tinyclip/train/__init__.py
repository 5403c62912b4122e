"The training loop below `tinyclip.distill`: one step, one engine, one run"
