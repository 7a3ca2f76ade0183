"""What is compared, and how its servers are started, asked and stopped.

host      this machine: its folders, its GPU, and who may listen at a port
process   a process, which is ended with all that it started
arms      the arms of a comparison
models    the checkpoints that are served; `checkpoint` writes one
servers   a server of one arm
launch    a server of one model, as a user starts it; `demo` asks it one question
one_rank  an engine's parts in this process
plugin    what every measured server does beside serving
"""
