use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use super::sim::Sim;

/// Runs tasks on one thread, and draws which of those that are ready goes on.
///
/// Each task has a weight that is drawn anew now and then: so there are stretches in which one task
/// runs far ahead of another, which even chances would hardly ever give.
pub(super) struct Executor {
    sim: Arc<Sim>,
    tasks: Vec<Task>,
}

struct Task {
    name: String,
    future: Option<Pin<Box<dyn Future<Output = ()>>>>,
    ready: Arc<Ready>,
    waker: Waker,
    weight: u32,
}

struct Ready(AtomicBool);

impl Wake for Ready {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Executor {
    pub(super) fn new(sim: &Arc<Sim>) -> Self {
        Self {
            sim: Arc::clone(sim),
            tasks: Vec::new(),
        }
    }

    pub(super) fn spawn(&mut self, name: String, future: impl Future<Output = ()> + 'static) {
        let ready = Arc::new(Ready(AtomicBool::new(true)));
        let task = Task {
            name,
            future: Some(Box::pin(future)),
            waker: Waker::from(Arc::clone(&ready)),
            ready,
            weight: WEIGHTS[0],
        };
        self.tasks.push(task);
    }

    /// Runs until every task has ended; calls `between` after each step of one.
    pub(super) fn run(&mut self, mut between: impl FnMut()) {
        for task in 0..self.tasks.len() {
            self.tasks[task].weight = self.sim.one_of(&WEIGHTS);
        }
        for _ in 0..STEPS_MAX {
            let Some(chosen) = self.choose() else {
                return self.stop_if_stalled();
            };
            self.step(chosen);
            between();
        }
        panic!("seed {}: no end after {STEPS_MAX} steps", self.sim.seed);
    }

    /// The same for so many steps at most. Says whether every task has ended.
    pub(super) fn run_for(&mut self, steps: u64) -> bool {
        for _ in 0..steps {
            let Some(chosen) = self.choose() else {
                self.stop_if_stalled();
                return true;
            };
            self.step(chosen);
        }
        false
    }

    fn choose(&mut self) -> Option<usize> {
        if self.sim.one_in(REWEIGH) {
            let task = self.sim.below(self.tasks.len() as u64) as usize;
            self.tasks[task].weight = self.sim.one_of(&WEIGHTS);
        }
        let ready = |task: &Task| task.future.is_some() && task.ready.0.load(Ordering::Relaxed);
        let total: u32 = self
            .tasks
            .iter()
            .filter(|t| ready(t))
            .map(|t| t.weight)
            .sum();
        if total == 0 {
            return None;
        }
        let mut drawn = self.sim.below(u64::from(total)) as u32;
        self.tasks.iter().position(|task| {
            if !ready(task) {
                return false;
            }
            let found = drawn < task.weight;
            drawn = drawn.saturating_sub(task.weight);
            found
        })
    }

    fn step(&mut self, chosen: usize) {
        let task = &mut self.tasks[chosen];
        task.ready.0.store(false, Ordering::Relaxed);
        self.sim.enter_task(chosen);
        let future = task
            .future
            .as_mut()
            .expect("only tasks that have not ended are chosen");
        if let Poll::Ready(()) = future.as_mut().poll(&mut Context::from_waker(&task.waker)) {
            task.future = None;
        }
    }

    fn stop_if_stalled(&self) {
        let waiting: Vec<_> = self
            .tasks
            .iter()
            .filter(|task| task.future.is_some())
            .collect();
        let names: Vec<_> = waiting.iter().map(|task| &task.name).collect();
        assert!(
            names.is_empty(),
            "seed {}: stalled, waiting for ever: {names:?}",
            self.sim.seed
        );
    }
}

/// Lets others run, a few times.
pub(super) async fn pause(sim: &Sim) {
    for _ in 0..=sim.below(PAUSES_MAX) {
        yield_now().await;
    }
}

async fn yield_now() {
    let yielded = Mutex::new(false);
    std::future::poll_fn(|context| {
        let mut yielded = yielded.lock().unwrap_or_else(PoisonError::into_inner);
        if *yielded {
            return Poll::Ready(());
        }
        *yielded = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

const WEIGHTS: [u32; 4] = [1, 8, 64, 512];
/// A weight changes once in so many steps.
const REWEIGH: u64 = 40;
const PAUSES_MAX: u64 = 3;
/// Far more than any schedule takes, which is some ten thousand.
const STEPS_MAX: u64 = 2_000_000;
