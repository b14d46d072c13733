"""Error analysis: what it costs to say a MOS as a word or a token. `README.md` beside this file has the theory.

conversion_error  MOS -> label -> MOS as pure functions, closed forms, the parts of the error, rank ceilings
simulation        noise in a network's numbers, simulated and to second order
study             all formulations on one dataset
measured          the same on what a trained network says
figures           pictures
error_report      tables, conclusions, CSV, JSON, PNG, HTML
"""
