"""How columns of a source become rows: texts, labels, documents, questions, images."""
