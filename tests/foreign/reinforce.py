"""REINFORCE with a learned baseline: balance a pole. No data set; the environment is below."""

import math

import torch
from ray import tune
from torch import nn
from torch.distributions import Categorical


class Poles:
    """Poles on carts, many at once. State: position, velocity, angle, angular velocity."""

    def __init__(self, num_envs, generator):
        self.num_envs, self.generator = num_envs, generator

    def reset(self):
        self.state = 0.1 * torch.rand(self.num_envs, 4, generator=self.generator) - 0.05
        self.alive = torch.ones(self.num_envs, dtype=torch.bool)
        return self.state.clone()

    def step(self, action):
        x, dx, angle, spin = self.state.unbind(1)
        force = torch.where(action == 1, 10.0, -10.0)
        sin, cos = angle.sin(), angle.cos()
        push = (force + 0.05 * spin**2 * sin) / 1.1
        torque = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        acceleration = push - 0.05 * torque * cos / 1.1
        self.state = torch.stack(
            [x + 0.02 * dx, dx + 0.02 * acceleration, angle + 0.02 * spin, spin + 0.02 * torque], dim=1
        )
        reward = self.alive.float()
        self.alive &= (self.state[:, 0].abs() < 2.4) & (self.state[:, 2].abs() < 12 * math.pi / 180)
        return self.state.clone(), reward, ~self.alive


class ActorCritic(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, hidden), nn.Tanh())
        self.policy = nn.Linear(hidden, 2)
        self.value = nn.Linear(hidden, 1)

    def forward(self, state):
        h = self.body(state)
        return Categorical(logits=self.policy(h)), self.value(h).squeeze(-1)


def rollout(env, model, horizon):
    state, log_probs, values, entropies, rewards = env.reset(), [], [], [], []
    for _ in range(horizon):
        dist, value = model(state)
        action = dist.sample()
        state, reward, done = env.step(action)
        log_probs.append(dist.log_prob(action))
        values.append(value)
        entropies.append(dist.entropy())
        rewards.append(reward)
        if done.all():
            break
    return tuple(map(torch.stack, (log_probs, values, entropies, rewards)))


def discounted(rewards, gamma):
    returns, running = torch.zeros_like(rewards), torch.zeros(rewards.shape[1])
    for t in reversed(range(len(rewards))):
        running = rewards[t] + gamma * running
        returns[t] = running
    return returns


def train(lr=0.01, gamma=0.99, hidden=32, num_envs=16, iterations=40, horizon=200, entropy_bonus=0.01, seed=1):
    torch.manual_seed(seed)
    env = Poles(num_envs, torch.Generator().manual_seed(seed))
    model = ActorCritic(hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    recent = None
    for iteration in range(1, iterations + 1):
        log_probs, values, entropies, rewards = rollout(env, model, horizon)
        returns = discounted(rewards, gamma)
        mask = rewards > 0
        advantage = (returns - values.detach())[mask]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        policy_loss = -(log_probs[mask] * advantage).mean()
        value_loss = nn.functional.smooth_l1_loss(values[mask], returns[mask])
        loss = policy_loss + 0.5 * value_loss - entropy_bonus * entropies[mask].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

        mean_return = rewards.sum(0).mean().item()
        recent = mean_return if recent is None else 0.8 * recent + 0.2 * mean_return
        if iteration % 5 == 0:
            print(f"iteration {iteration}: return {mean_return:.1f}, recent {recent:.1f}")
            tune.report({"iteration": iteration, "mean_return": mean_return, "recent_return": recent})
    return recent


if __name__ == "__main__":
    print("recent return:", train())
