"""The figures and the drawings of `predistill report`; reads stores, and the JSON files of runs."""
