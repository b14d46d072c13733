"""Error analysis: what it costs to say a MOS as a word or a token. `README.md` beside this file has the theory.

conversion_error  MOS -> label -> MOS as pure functions, closed forms, the parts of the error
ceilings          best SRCC, PLCC and KRCC that a label leaves possible
simulation        Monte-Carlo check of the closed forms; noisy logits
opinions          MOS and their spread out of a table of any length
error_rows        the error of one formulation, summed chunk by chunk
    study             all formulations on one dataset
measured          the same on what a trained network says
tables, figures   for the terminal and the page
    report            CSV, JSON, PNG, HTML
"""
