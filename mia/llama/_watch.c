/* llama.cpp's scheduler asks before every node of every graph whether somebody wants to see it,
 * a thousand times per token. This answers if the graph is the expected one, and calls Python for
 * the rest. It is optional: without it Python answers everything (tracer.py). */

#include <stdbool.h>
#include <stdint.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum answer { NO = 0, YES = 1, ASK_PYTHON = 2 };

struct watch {
    int64_t index;         /* the node that is asked about next */
    int64_t n;             /* nodes expected; 0 if Python is to answer everything */
    void *const *addrs;    /* the nodes, in order */
    const uint8_t *requested; /* for each an enum answer */
    bool (*python)(void *node, bool ask, void *unused);
};

EXPORT bool mia_watch(void *node, bool ask, void *user_data)
{
    struct watch *w = user_data;
    int64_t i = w->index;

    if (ask && i < w->n && w->addrs[i] == node && w->requested[i] != ASK_PYTHON) {
        w->index = i + 1;
        return w->requested[i] == YES;
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
