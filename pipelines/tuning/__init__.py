"""The auto-tuner: what makes a pipeline fast on this machine, measured, predicted in combination, verified.

`goals` what is asked for, `conditions` what is fixed (model, size, steps, machine), `prompts` and `workload` how
requests are made and timed, `candidates` what is tried, `measuring` one acceleration on the pipeline (`memory`,
`breakdown`, `tokens`, `cache_profile` what it needs), `measurement` what was found. `cost_model` and `error_model` say
what combinations would take and change (`pair_factors` what two techniques do together), `front` which results no other
dominates, `choosing` what users get of them, `solvers` what fewer steps of another solver would. `record` is the file
that keeps all of it, `progress` what a running tuning tells, `tuner` the search, `profiles` named settings; `speed_up`
is the one call (public as `pipelines.speed_up`), `handle` and `reports` what it returns.
"""
