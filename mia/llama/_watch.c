/* llama.cpp's scheduler asks before every node of every graph whether somebody wants to see it,
 * a thousand times per token. This answers if the graph is the expected one, copies the numbers of
 * nodes that are only read, does the arithmetic of simple edits, and calls Python for the rest: after
 * a stretch of arithmetic Python's code and data have left the processor's caches, and a call takes
 * ten times as long as it should.
 * It is optional: without it Python answers everything (tracer.py). */

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum answer { NO = 0, YES = 1, ASK_PYTHON = 2, COPY = 3, EDIT = 4 };
enum operation { ADD = 0, SET = 1, MULTIPLY = 2 };

/* the beginning of struct ggml_tensor; library.py proves it */
struct tensor {
    int type; /* 0 is float32 */
    void *buffer;
    int64_t ne[4];
    size_t nb[4];
};

/* what an edit does to consecutive numbers of a row */
struct change {
    int64_t operation;
    int64_t first, n;      /* which numbers of the node */
    int64_t row, row_n;    /* and those of the whole row, which are looked at behind it */
    double largest;        /* that they may be */
    const float *values;   /* n of them */
};

struct watch {
    int64_t index;         /* the node that is asked about next */
    int64_t n;             /* nodes expected; 0 if Python is to answer everything */
    void *const *addrs;    /* the nodes, in order */
    const uint8_t *requested; /* for each an enum answer */
    bool (*python)(void *node, bool ask, void *unused);
    void *const *to;       /* for each to COPY, where to */
    const uint64_t *bytes; /* and how many it must have, these and those to EDIT */
    bool (*is_host)(void *buffer);
    const struct change *const *changes; /* for each to EDIT, what to do */
    const int64_t *n_changes;
    float *old;            /* room for the numbers that one node's changes overwrite */
    int64_t data;          /* where in a tensor the address of its numbers is */
};

/* a node's numbers, if they are float32, side by side, in the host's memory, as many as expected */
static float *numbers(const struct watch *w, int64_t i)
{
    const struct tensor *t = w->addrs[i];
    size_t bytes = sizeof(float);

    for (int axis = 0; axis < 4; axis++) {
        if (t->nb[axis] != bytes && t->ne[axis] != 1)
            return 0;
        bytes *= (size_t)t->ne[axis];
    }
    if (t->type != 0 || bytes != w->bytes[i] || !t->buffer || !w->is_host(t->buffer))
        return 0;
    return *(void *const *)((const char *)t + w->data);
}

static bool copied(const struct watch *w, int64_t i)
{
    const float *from = numbers(w, i);

    if (from)
        memcpy(w->to[i], from, w->bytes[i]);
    return from != 0;
}

/* whether all are finite and none is too large */
static bool sound(const float *x, int64_t n, double largest)
{
    float most = largest < FLT_MAX ? (float)largest : FLT_MAX;

    for (int64_t j = 0; j < n; j++)
        if (!(fabsf(x[j]) <= most)) /* NaN is not */
            return false;
    return true;
}

static void apply(const struct change *c, float *x)
{
    for (int64_t j = 0; j < c->n; j++)
        switch (c->operation) {
        case ADD: x[j] += c->values[j]; break;
        case SET: x[j] = c->values[j]; break;
        case MULTIPLY: x[j] *= c->values[j]; break;
        }
}

/* whether all changes of a node were made; if something is wrong none is, and Python says what */
static bool edited(const struct watch *w, int64_t i)
{
    float *x = numbers(w, i), *old = w->old;
    const struct change *changes = w->changes[i];
    int64_t k;

    if (!x)
        return false;
    for (k = 0; k < w->n_changes[i]; k++) {
        const struct change *c = &changes[k];
        memcpy(old, x + c->first, c->n * sizeof(float));
        old += c->n;
        apply(c, x + c->first);
        if (!sound(x + c->row, c->row_n, c->largest))
            break;
    }
    if (k == w->n_changes[i])
        return true;
    for (; k >= 0; k--) {
        old -= changes[k].n;
        memcpy(x + changes[k].first, old, changes[k].n * sizeof(float));
    }
    return false;
}

EXPORT bool mia_watch(void *node, bool ask, void *user_data)
{
    struct watch *w = user_data;
    int64_t i = w->index;

    if (ask && i < w->n && w->addrs[i] == node && w->requested[i] != ASK_PYTHON) {
        w->index = i + 1;
        return w->requested[i] != NO;
    }
    if (!ask && 0 < i && i <= w->n) {
        if (w->requested[i - 1] == COPY && copied(w, i - 1))
            return true;
        if (w->requested[i - 1] == EDIT && edited(w, i - 1))
            return true;
    }
    return w->python(node, ask, 0);
}

/* Python compares this with its own struct: the file may have been built before it changed */
EXPORT const int64_t mia_watch_size = sizeof(struct watch);

/* setuptools builds this as an extension, whose entry MSVC's linker wants to see; it is loaded
 * as a plain library, and never imported */
EXPORT void *PyInit__watch(void)
{
    return 0;
}
