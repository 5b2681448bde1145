"""Pipeline parallelism as data: what each rank does and in which order (`registry.build`), the proof that this works
(`verify.verify`), what it costs (`simulate.simulate`), and the events that simulated and recorded steps share. Nothing
here needs torch."""
