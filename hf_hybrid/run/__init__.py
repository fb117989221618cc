"""
A recipe from start to end, in a folder that can be gone on with.

`runner.py` enters the folder and calls `pipeline.py`, which has a method for each stage; `stages.py` trains one,
`score.py` scores and selects. What they read and leave: `recipe.py` and `schema.py`, `folder.py`, `origin.py`,
`inputs.py`. Before a run: `starter.py` writes a recipe, `plan.py` and `footprint.py` say what it takes. During one:
`progress.py`, `plots.py`, `kernel_tuning.py`.
"""
