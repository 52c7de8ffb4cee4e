/* llama.cpp's scheduler asks before every node of every graph whether somebody wants to see it,
 * a thousand times per token. This answers if the graph is the expected one, copies the numbers of
 * nodes that are only read, and calls Python for the rest: after a stretch of arithmetic Python's
 * code and data have left the processor's caches, and a call takes ten times as long as it should.
 * It is optional: without it Python answers everything (tracer.py). */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum answer { NO = 0, YES = 1, ASK_PYTHON = 2, COPY = 3 };

/* the beginning of struct ggml_tensor; library.py proves it */
struct tensor {
    int type; /* 0 is float32 */
    void *buffer;
    int64_t ne[4];
    size_t nb[4];
};

struct watch {
    int64_t index;         /* the node that is asked about next */
    int64_t n;             /* nodes expected; 0 if Python is to answer everything */
    void *const *addrs;    /* the nodes, in order */
    const uint8_t *requested; /* for each an enum answer */
    bool (*python)(void *node, bool ask, void *unused);
    void *const *to;       /* for each to COPY, where to */
    const uint64_t *bytes; /* and how many */
    bool (*is_host)(void *buffer);
    int64_t data;          /* where in a tensor the address of its numbers is */
};

/* whether they could be copied: float32, side by side, in the host's memory, as many as expected */
static bool copied(const struct watch *w, int64_t i)
{
    const struct tensor *t = w->addrs[i];
    size_t bytes = sizeof(float);

    for (int axis = 0; axis < 4; axis++) {
        if (t->nb[axis] != bytes && t->ne[axis] != 1)
            return false;
        bytes *= (size_t)t->ne[axis];
    }
    if (t->type != 0 || bytes != w->bytes[i] || !t->buffer || !w->is_host(t->buffer))
        return false;
    memcpy(w->to[i], *(void *const *)((const char *)t + w->data), bytes);
    return true;
}

EXPORT bool mia_watch(void *node, bool ask, void *user_data)
{
    struct watch *w = user_data;
    int64_t i = w->index;

    if (ask && i < w->n && w->addrs[i] == node && w->requested[i] != ASK_PYTHON) {
        w->index = i + 1;
        return w->requested[i] != NO;
    }
    if (!ask && 0 < i && i <= w->n && w->requested[i - 1] == COPY && copied(w, i - 1))
        return true;
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
