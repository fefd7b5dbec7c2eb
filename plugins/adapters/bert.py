"""BERT and its relatives: BERT, RoBERTa and ELECTRA have one layout, DistilBERT has other names."""

from recap_cli.api import Adapter, Heads, Neurons

EMBEDDINGS = ("*word_embeddings.*", "*position_embeddings.*", "*token_type_embeddings.*", "*embeddings_project.*")

BERT = Adapter(
    tables=(
        Heads(
            block="**encoder.layer.*",
            attention="attention.self",
            q="attention.self.query",
            k="attention.self.key",
            v="attention.self.value",
            out="attention.output.dense",
            head_dim="attention_head_size",
            count=("num_attention_heads",),
            width=("all_head_size",),
        ),
        Neurons(block="**encoder.layer.*", up=("intermediate.dense",), down="output.dense"),
    ),
    embeddings=EMBEDDINGS,
    # The pooler is part of the head: it is between encoder and classifier, and checkpoints of bare encoders may lack it.
    head=("classifier.*", "*.pooler.*"),
)

DISTILBERT = Adapter(
    tables=(
        Heads(
            block="**transformer.layer.*",
            attention="attention",
            q="attention.q_lin",
            k="attention.k_lin",
            v="attention.v_lin",
            out="attention.out_lin",
            head_dim="attention_head_size",
            count=("n_heads",),
        ),
        Neurons(block="**transformer.layer.*", up=("ffn.lin1",), down="ffn.lin2"),
    ),
    embeddings=EMBEDDINGS,
    head=("pre_classifier.*", "classifier.*"),
)
