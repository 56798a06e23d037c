"""Checkpoints: what a run saves, how it is written by many processes, and how it is read again.

    OUT/checkpoints/step-000050/checkpoint.json                        the manifest, written last
    OUT/checkpoints/step-000050/weights-00003-of-00008.safetensors     the shards of process 3; moment1, moment2 alike
    OUT/checkpoints/.step-000100.tmp/                                  one that is being written, or that a kill has left
    OUT/checkpoints/latest, best                                       names that point at two of the complete

`shards` says what a process has to save, `copies` has the memory for its copy, `portable` and a backend's native format how
arrays become files, `formats` which of the two it is, `manifest` what else there is to know, `store` when they are written,
`notes` how its processes meet, `retention` what is kept. `verify` says whether what is read is what was written, and
`wholeness` whether that is all there has to be; `checkpoint` opens it for a run, `newest` for those that change nothing, and
`export` as files of Hugging Face and PEFT. A run resumes where its inputs are the same (`identity`) and its recipe is
(`resume`), but for what a user may `allow`. What all of this asks of a backend is in `states`. `command` is
`trainspec checkpoint`, `summary` what it shows. A checkpoint is complete as soon
as its directory has its final name (`folders`).
"""
