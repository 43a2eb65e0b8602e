// glibc 2.34 moved its threads into libc and gave their functions a new version, so a library that is linked
// there would not load on an older system. These definitions, hidden in our library, lead its calls to the
// versions that every glibc has.
#include <features.h>

#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 34)
#include <pthread.h>

#if defined(__x86_64__)
#define HOTLOOP_OLDEST "GLIBC_2.2.5"
#else
#define HOTLOOP_OLDEST "GLIBC_2.17"
#endif

#define HOTLOOP_OLD(name) __asm__(".symver old_" #name "," #name "@" HOTLOOP_OLDEST)

extern "C" {

int old_pthread_create(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
int old_pthread_join(pthread_t, void**);
int old_pthread_detach(pthread_t);
HOTLOOP_OLD(pthread_create);
HOTLOOP_OLD(pthread_join);
HOTLOOP_OLD(pthread_detach);

__attribute__((visibility("hidden"))) int pthread_create(pthread_t* thread,
                                                         const pthread_attr_t* attributes,
                                                         void* (*start)(void*), void* given) noexcept {
  return old_pthread_create(thread, attributes, start, given);
}

__attribute__((visibility("hidden"))) int pthread_join(pthread_t thread, void** result) {
  return old_pthread_join(thread, result);
}

__attribute__((visibility("hidden"))) int pthread_detach(pthread_t thread) noexcept {
  return old_pthread_detach(thread);
}
}
#endif
